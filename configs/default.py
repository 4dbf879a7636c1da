"""All fields of an experiment, with units and meanings. Other experiments list only the fields that differ.

By itself it is the default experiment, scikit-learn's handwritten digits: no download, a small network trained from
scratch, two minutes on a laptop.
"""

import ml_collections

from cib_jax.config import own_fields


def get_config() -> ml_collections.ConfigDict:
    c = ml_collections.ConfigDict()

    c.seed = 0  # seed of initial weights, order, views and bits; data.seed is that of splits and stored views
    c.bits = 32  # length of a code
    c.k = -1  # number of ranked images that MAP@k evaluates; 0 = the whole database, -1 = as the protocol defines
    c.extensions = ""  # file of your own parts, which cib_jax.register enters; see docs/extending.md

    # Network.
    c.backbone = "convnet"  # a network of docs/backbones.md; --config.backbone= lists them
    c.backbone_weights = ""  # a weight file (.safetensors, .pth); "" = the published ones of the backbone
    # float32 | bfloat16 | auto: number format of the backbone; the head is always float32. auto = bfloat16 for a frozen
    # backbone on a device with units for it, else float32; a run keeps the one with which it began.
    c.backbone_dtype = "auto"
    c.frozen = False  # True: only the hash head learns; False: the backbone learns, too
    c.image_size = 16  # side of the network's square input in pixels; 0 = the backbone's usual one
    c.hidden = 1024  # width of the hash head's hidden layer
    c.init_from = ""  # folder of a run or a saved hasher of the same shapes, with whose weights training begins

    # Method (CIBHash, https://arxiv.org/abs/2105.06138).
    c.objective = "cibhash"  # naive_cl | cl_hash | cibhash | diffusion (docs/beyond.md) | one of your own
    c.binary = "stochastic"  # stochastic: bits are drawn (the paper) | deterministic: thresholded (the published code)
    c.temperature = 0.5  # τ of the contrast; 0 = the objective's: 0.3, the paper's, or of diffusion, from the data
    c.beta = 0.001  # β, weight of the bottleneck term in nats
    c.sharpness = 6.0  # with "diffusion": power of the ratio by which a walk links two images more often than chance
    c.nested = False  # True: the first 16, 32, 64, … bits of a code are to be codes, too, to be cut later
    c.head_dropout = 0.0  # probability that the head's input lacks a feature in training; 0.5 in the published code
    c.augment = "digits"  # family of views: photo (the paper's) | digits | of features: noise | stored
    c.feature_noise = 0.7  # with "noise": deviation of the noise added to standardized features
    c.feature_dropout = 0.3  # with "noise": probability that a feature is dropped from a view

    # With "diffusion": the teacher, trained first by the contrast of views. The walk uses neighbors of its embeddings.
    c.teacher = ml_collections.ConfigDict()
    # naive_cl | cl_hash | cibhash; "" = naive_cl, but cibhash where views are noise on given features
    c.teacher.objective = ""
    c.teacher.bits = 128  # length of the embeddings, in real numbers
    c.teacher.temperature = 0.2  # τ of the teacher's contrast
    c.teacher.epochs = 0  # passes over the training images; 0 = epochs; if that is 0, too, by their number
    c.teacher.neighbours = 15  # neighbors of each image in the graph
    c.teacher.dimensions = 200  # largest number of diffusion coordinates
    c.teacher.steps = 20  # steps of the random walk

    # Optimization: Adam; the paper's learning rate is constant, without decay of weights and clipping of gradients.
    c.batch_size = 64  # images per step; two views each; 0 = 64, and of diffusion by the number of images
    c.partial_batch = (
        False  # True: an epoch ends with a smaller batch of the images left over; False: they are left out
    )
    # Images of one device that pass through the network at a time: less memory, at the cost of a second pass; 0 = all.
    # The codes of the whole batch are negatives of each other in any case.
    c.micro_batch = 0
    c.devices = 0  # devices that share each batch; 0 = all devices of all processes
    # Passes over the training images; 0 = the paper's, 80 for 16 bits and 60 for other lengths, and of diffusion by the
    # number of images.
    c.epochs = 60
    c.optimizer = "adam"  # adam, which the fields below set, or one of your own (docs/extending.md)
    c.learning_rate = 1e-3  # learning rate of Adam, or the highest of the schedule
    c.learning_rate_schedule = "constant"  # constant | cosine (falls to 0 at the last step of all epochs)
    c.warmup_steps = 0  # steps in which the learning rate rises linearly from 0
    c.weight_decay = 0.0  # decoupled decay of all trained parameters (AdamW)
    c.clip_norm = 0.0  # longest gradient of all trained parameters together, longer ones are scaled; 0 = any

    # Trained part of a backbone that is not frozen; see docs/fine-tuning.md.
    c.fine_tune = ml_collections.ConfigDict()
    c.fine_tune.blocks = 0  # number of last blocks that learn, with all layers after them; 0 = the whole backbone
    c.fine_tune.learning_rate = 0.0  # learning rate of the backbone; 0 = learning_rate, as for the head
    c.fine_tune.checkpointing = False  # True: recomputes blocks for their gradients, for less memory
    c.fine_tune.lora_rank = 0  # rank of low-rank corrections that learn instead of the weights; 0 = the weights learn
    c.fine_tune.lora_alpha = 8.0  # scale of the corrections: lora_alpha / lora_rank

    c.data = ml_collections.ConfigDict()
    c.data.seed = 0  # seed of the splits and of the views in a bank, so that runs with different seeds can share them
    # digits | folder (of photos) | list (CSV or Parquet of paths) | features (vectors of any model) | nuswide | mscoco
    # | a TFDS name whose images have a label, or several, such as cifar10.
    c.data.name = "digits"
    c.data.dir = ""  # the folder, the file, or the data_dir of TFDS ("" = ~/tensorflow_datasets)
    c.data.raw_dir = ""  # nuswide, mscoco: folder of the published files; needed until they are prepared in data.dir
    c.data.labelled = True  # False: ignores the labels of a folder, a list or features

    # The split. A protocol by name (cib_jax/data/splits.py) sets the six fields below and k where they are -1 or
    # "protocol". With "own", -1 means 0, and k is 1000.
    c.data.protocol = "own"
    c.data.queries = 297  # queries drawn from a data set without a test split; 0 = the test split of the data set
    c.data.queries_per_class = -1  # the same, per class
    # Training images drawn from the database; the whole database if it is smaller, or if train_per_class is 0, too.
    c.data.train_images = -1
    c.data.train_per_class = -1  # the same, per class
    c.data.validation = "protocol"  # none | query_half (half the queries) | database (see below)
    c.data.validation_queries = 1000  # with "database": validation queries, drawn from its images that do not train

    # TFDS data sets only; "" = chosen automatically if there is one candidate.
    c.data.image_feature = ""
    c.data.label_feature = ""  # feature with one label or several; slashes for nested features, as in objects/label
    c.data.database_split = ""  # split that trains and is searched; "" = train. Slices such as train[:1000] work
    c.data.query_split = ""  # split with the queries; "" = test

    c.data.stored_size = 0  # side in pixels to which images are resized on the host; 0 = unchanged, all of one size
    c.data.resident_mb = 2048  # training images up to this many MiB are kept on the device; more are streamed
    c.data.max_bad_fraction = 0.05  # a run does not start if a larger fraction of the photos is unreadable
    c.data.max_megapixels = 178  # larger photos count as unreadable
    c.data.truncated = False  # decode JPEGs that lack their last bytes, with gray in their place, and list them

    c.train = ml_collections.ConfigDict()
    c.train.views = 0  # number of views per image with features computed once; 0 = fresh views at every step
    c.train.bank_mb = 8192  # largest size of the view bank, in MiB
    # Score of a validation, by which the best checkpoint is kept: map, of the images that data.validation holds out, if
    # any | separation, of the codes of up to 2,000 training images, without a label (docs/results.md).
    c.train.validate_by = "map"
    c.train.validate_every = 20  # epochs between validations
    c.train.patience = 6  # validations without a better score before training stops
    c.train.checkpoint_every = 1  # epochs between checkpoints
    # Folder of the checkpoints: "" = checkpoints/ in the workdir, an absolute path, or gs://BUCKET/FOLDER (needs the
    # extra "gcs"). It belongs to one run; each run of a comparison or a search gets a subfolder.
    c.train.checkpoint_dir = ""

    c.encode_batch = 100  # images per batch without training: the view bank, the evaluation

    c.cache = ml_collections.ConfigDict()
    # Folder for the features of frozen backbones and decoded photos, for later runs: "" = ~/.cache/cib_jax, "none" = no
    # cache (photos are then kept in the workdir).
    c.cache.dir = ""
    c.cache.mb = 20480  # largest size of the features, and of the photos, in MiB; the least recently used are deleted

    c.log = ml_collections.ConfigDict()
    # Destinations of each epoch's metrics besides metrics.jsonl: tensorboard (tensorboard/ in the workdir) | wandb |
    # mlflow (these two need the extra of that name), separated by commas; "" = none.
    c.log.writers = "tensorboard"  # see docs/logging.md

    c.report = ml_collections.ConfigDict()
    c.report.write = True  # writes figures and tables to report/, and all of them to report/index.html
    c.report.embedded = 2000  # images of the database in the t-SNE figure; 0 = no such figure

    # --mode=compare: every method with every length and seed; see docs/results.md.
    c.compare = ml_collections.ConfigDict()
    # Rows of the table: objectives or baselines (cib_jax/baselines). A name may be followed by fields with other values
    # for this row, as in "itq, cibhash, cibhash temperature=0.5 beta=0".
    c.compare.methods = (
        "lsh, pca_sign, itq, spectral, spherical, anchor_graph, greedy_hash, bi_half, autoencoder, "
        "naive_cl, cl_hash, cibhash"
    )
    c.compare.bits = "16, 32, 64"  # lengths of codes
    c.compare.seeds = "0, 1, 2"  # seeds; each row and length has a run with each
    c.compare.workers = 0  # processes that work at the same time; 0 = as cores and memory allow, 1 on accelerators

    # --mode=tune: trials with hyper-parameters drawn from `space`, ranked by `score`; needs the extra "tune".
    c.tune = ml_collections.ConfigDict()
    # Fields with their choices, a|b|c, or their range, low..high, with "log" for a uniform draw of the logarithm.
    # The paper's grid is "learning_rate=1e-3|1e-4, batch_size=64|128|256, temperature=0.2|0.3|0.4, beta=1e-5|1e-4|1e-3|
    # 5e-3"; this default covers more.
    c.tune.space = "learning_rate=1e-4..3e-3 log, batch_size=64|128|256, temperature=0.1..0.6, beta=1e-5..1e-1 log"
    c.tune.trials = 30  # number of trials
    c.tune.sampler = "tpe"  # tpe (learns from earlier trials) | random | grid (every pair of choices, once)
    # Score to maximize: one without labels, separation (the one that ranks runs as MAP does) | neighbour_agreement
    # | view_agreement | entropy | decorrelation | contrast (cib_jax/retrieval/code_quality.py, docs/results.md), or
    # validation_map (needs data.validation).
    c.tune.score = "separation"
    c.tune.images = 2000  # random images of the database for the scores without labels
    c.tune.workers = 0  # as compare.workers; 1 with tpe, which waits for earlier trials
    c.update(own_fields)
    return c
