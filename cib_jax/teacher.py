"""What the objective "diffusion" learns from: a teacher of its own, without labels, and how its embeddings are used."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A head that is trained first, by the contrast of views alone, on real numbers, and then seen as a graph.

    Its embeddings are the logits of the objective "naive_cl"; the walk on the graph of their neighbours
    (`diffusion.coordinates`) says which images belong together. Raises ValueError if a value is out of range.

    Examples:
      >>> import cib_jax as cib
      >>> cib.Teacher(epochs=20).check(images=50_000)
      >>> cib.Teacher(neighbours=20).check(images=10)
      Traceback (most recent call last):
      ValueError: teacher.neighbours: 20 must be less than the 10 training images; lower it
    """

    bits: int = 128
    """Length of an embedding, in real numbers."""
    temperature: float = 0.2
    """τ of its contrast."""
    epochs: int = 0
    """Passes over the training images; 0: as many as the codes take."""
    neighbours: int = 20
    """Of each image in the graph."""
    dimensions: int = 50
    """Of the coordinates: about as many groups of images as can be told apart."""
    steps: int = 20
    """Of the walk."""

    def __post_init__(self) -> None:
        for name, least in (("epochs", 0), ("neighbours", 1), ("dimensions", 2), ("steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"teacher.{name}: {getattr(self, name)} must be {least} or more")
        if self.bits < 8 or self.bits % 8:
            raise ValueError(f"teacher.bits: {self.bits} must be a multiple of 8, such as 128")
        if not self.temperature > 0:
            raise ValueError(f"teacher.temperature: {self.temperature} must be greater than 0")

    def check(self, images: int) -> None:
        """Checks that so many training images are enough for the graph.

        Raises:
          ValueError: they are not.
        """
        for name in ("neighbours", "dimensions"):
            if getattr(self, name) >= images:
                raise ValueError(
                    f"teacher.{name}: {getattr(self, name)} must be less than the {images} training images; lower it"
                )

    @property
    def method(self) -> dict[str, Any]:
        """The arguments of a training step that are its own."""
        return {"objective": "naive_cl", "temperature": self.temperature}

    @property
    def walk(self) -> dict[str, Any]:
        """The keyword arguments of `diffusion.coordinates`."""
        return {"neighbours": self.neighbours, "dimensions": self.dimensions, "steps": self.steps}
