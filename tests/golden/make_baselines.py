"""Writes baselines.npz: the loss of iterative quantization by FAISS. Run by hand, with faiss-cpu installed.

`python -m tests.golden.make_baselines`

FAISS 1.15.1 alternates as the paper does, but its loss rises at the first iteration and ends higher than that of plain
orthogonal Procrustes from the same rotation. Its loss is therefore an upper bound, not the target.
"""

import pathlib

import faiss
import numpy as np

HERE = pathlib.Path(__file__).parent
BITS = 8


def main() -> None:
    generator = np.random.default_rng(0)
    # Centered, and with as many axes as bits, so that only the rotation is compared.
    projected = generator.normal(size=(300, BITS)) * np.linspace(3, 0.5, BITS)
    projected = (projected - projected.mean(axis=0)).astype(np.float32)
    start = np.linalg.qr(generator.normal(size=(BITS, BITS)))[0]
    matrix = faiss.ITQMatrix(BITS)
    matrix.max_iter = 50
    faiss.copy_array_to_vector(start.ravel().copy(), matrix.init_rotation)
    matrix.train(projected)
    turned = matrix.apply(projected)
    loss = np.square(np.sign(turned) - turned).sum()
    np.savez_compressed(HERE / "baselines.npz", projected=projected, start=start, faiss_itq_loss=loss)
    print(f"FAISS {faiss.__version__}: quantisation loss {loss:.4f}")


if __name__ == "__main__":
    main()
