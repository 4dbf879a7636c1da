"""Every field of an experiment, once, with its unit and meaning. An experiment's file lists only what differs."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    c = ml_collections.ConfigDict()

    c.seed = 0  # of initial weights, order, views and bits: every random number but those of data.seed
    c.bits = 32  # length of a code, a multiple of 8
    c.k = -1  # how many ranked images MAP@k looks at; 0 = the whole database, -1 = as the protocol says

    # Network.
    c.backbone = "efficientnet_lite0"  # a network of docs/backbones.md; --config.backbone= lists them
    c.backbone_weights = ""  # a weight file (.safetensors, .pth); "" = the published ones of the backbone
    c.backbone_dtype = "float32"  # float32 | bfloat16: in what the backbone computes; the head is always float32
    c.frozen = True  # True: only the hash head learns; False: the backbone learns too
    c.image_size = 0  # side of the network's square input in pixels; 0 = the backbone's usual one
    c.hidden = 1024  # width of the hash head's hidden layer

    # Method (CIBHash, https://arxiv.org/abs/2105.06138).
    c.objective = "cibhash"  # naive_cl | cl_hash | cibhash | diffusion (docs/beyond.md)
    c.binary = "stochastic"  # stochastic: bits are drawn (the paper) | deterministic: thresholded (the published code)
    c.temperature = 0.3  # τ of the contrast
    c.beta = 0.001  # β, weight of the bottleneck term in nats
    c.sharpness = 6.0  # "diffusion": power of the odds that a walk links two images, which codes learn
    c.augment = "photo"  # family of views: photo (the paper's) | digits | of features: noise | stored
    c.feature_noise = 0.7  # with "noise": deviation of the noise added to standardised features
    c.feature_dropout = 0.3  # with "noise": probability with which a feature is left out of a view

    # "diffusion": its teacher, trained first by the contrast of views; the walk goes along its embeddings' neighbours.
    c.teacher = ml_collections.ConfigDict()
    c.teacher.bits = 128  # length of its embeddings, in real numbers
    c.teacher.temperature = 0.2  # τ of its contrast
    c.teacher.epochs = 0  # passes over the training images; 0 = epochs
    c.teacher.neighbours = 20  # of each image in the graph
    c.teacher.dimensions = 50  # of the walk's coordinates
    c.teacher.steps = 20  # of the walk

    # Optimization: Adam with a constant learning rate.
    c.batch_size = 64  # images per step; two views each
    # Images of one device that go through the network at a time: less memory for a second pass; 0 = all of them. The
    # whole batch is still one of negatives.
    c.micro_batch = 0
    c.devices = 0  # devices that share each batch, all its codes being negatives; 0 = all, of all processes
    c.epochs = 60  # passes over the training images; the paper takes 80 for 16 bits
    c.learning_rate = 1e-3  # of Adam

    # What learns of a backbone that is not frozen; see docs/fine-tuning.md.
    c.fine_tune = ml_collections.ConfigDict()
    c.fine_tune.blocks = 0  # its last blocks, with what comes after them; 0 = all of it
    c.fine_tune.learning_rate = 0.0  # of the backbone; 0 = learning_rate, which is then the head's too
    c.fine_tune.checkpointing = False  # True: blocks are computed again for their gradients, for less memory
    c.fine_tune.lora_rank = 0  # of low-rank corrections that learn in place of the weights; 0 = the weights learn
    c.fine_tune.lora_alpha = 8.0  # corrections count by this over their rank

    c.data = ml_collections.ConfigDict()
    c.data.seed = 0  # of the splits, and of the views in a bank, which runs with other seeds can so share
    # digits | folder (of photos) | list (CSV or Parquet of paths) | features (vectors of any model) | nuswide | mscoco
    # | a TFDS name whose images have a label, or several, such as cifar10.
    c.data.name = "cifar10"
    c.data.dir = ""  # the folder, the file, or where TFDS keeps its data sets ("" = ~/tensorflow_datasets)
    c.data.raw_dir = (
        ""  # nuswide, mscoco: the folder of the published files; needed until they are prepared in data.dir
    )
    c.data.labelled = True  # False: labels of a folder, a list or features are left aside

    # The split. A protocol by name (cib_jax/data/protocols.py) says the six fields below it and k; -1, or "protocol",
    # leaves them to it. "own": what is -1 is 0, k is 1000.
    c.data.protocol = "own"
    c.data.queries = -1  # queries drawn from a set that comes in one piece; 0 = the set's own test split
    c.data.queries_per_class = -1  # the same, per class
    # Training images drawn from the database; all train where there are no more, or where the next is 0 too.
    c.data.train_images = -1
    c.data.train_per_class = -1  # the same, per class
    c.data.validation = "protocol"  # none | query_half (half the queries) | database (see below)
    c.data.validation_queries = 1000  # with "database": images drawn from it, outside training, as validation queries

    # TFDS data sets only; "" = found by itself where there is one choice.
    c.data.image_feature = ""
    c.data.label_feature = ""  # of one label or several; slashes go into nested ones, as in objects/label
    c.data.database_split = ""  # what trains and is searched; "" = train. Slices such as train[:1000] work
    c.data.query_split = ""  # the queries; "" = test

    c.data.stored_size = 0  # side in pixels to which images are resized on the host; 0 = as stored, all of one size
    c.data.resident_mb = 2048  # training images up to this many MiB live on the device; more are streamed
    c.data.max_bad_fraction = 0.05  # a run is refused when a larger part of the photos cannot be read
    c.data.max_megapixels = 178  # larger photos are left out as unreadable

    c.train = ml_collections.ConfigDict()
    c.train.views = 0  # features of this many views per image are computed once; 0 = fresh views at every step
    c.train.bank_mb = 8192  # a bank that would take more MiB than this is refused
    c.train.validate_every = 20  # epochs between validations, where data.validation is not "none"
    c.train.patience = 6  # validations without a better MAP before training stops
    c.train.checkpoint_every = 1  # epochs between checkpoints
    # Where they lie: "" = checkpoints/ in the workdir, or an absolute folder, or gs://BUCKET/FOLDER (wants the extra
    # "gcs"). One run's alone; each run of a comparison or a search gets a folder of its own in it.
    c.train.checkpoint_dir = ""

    c.encode_batch = 100  # images per batch where nothing is learnt: the view bank, the evaluation

    c.cache = ml_collections.ConfigDict()
    # Where features of a frozen backbone and prepared photos are kept for later runs: "" = ~/.cache/cib_jax, "none" =
    # nowhere (photos then lie in the workdir).
    c.cache.dir = ""
    c.cache.mb = 20480  # what was not used for longest is deleted when all features, or all photos, take more MiB

    c.log = ml_collections.ConfigDict()
    # Who gets each epoch's numbers besides metrics.jsonl, which always has them: tensorboard (tensorboard/ in the
    # workdir) | wandb | mlflow (each wants the extra of its name), several with commas between them; "" = nobody.
    c.log.writers = "tensorboard"  # see docs/logging.md

    c.report = ml_collections.ConfigDict()
    c.report.write = True  # figures and tables of a run in report/, and index.html which holds them all
    c.report.embedded = 2000  # images of the database in the t-SNE picture; 0 = no such picture

    # --mode=compare: every method with every length and seed; see docs/results.md.
    c.compare = ml_collections.ConfigDict()
    # Rows of the table: an objective, or a baseline (cib_jax/baselines); fields that a row sets otherwise
    # follow its name, as in "itq, cibhash, cibhash temperature=0.5 beta=0".
    c.compare.methods = (
        "lsh, pca_sign, itq, spectral, spherical, anchor_graph, greedy_hash, bi_half, autoencoder, "
        "naive_cl, cl_hash, cibhash"
    )
    c.compare.bits = "16, 32, 64"  # lengths of codes
    c.compare.seeds = "0, 1, 2"  # each gives a run of every row and length
    c.compare.workers = 0  # processes at work at once; 0 = as many as there are cores and memory for, 1 on accelerators

    # --mode=tune: trials with hyper-parameters drawn from `space`, judged by `score`; wants the extra "tune".
    c.tune = ml_collections.ConfigDict()
    # Fields with what they may be: choices, a|b|c, or a range, low..high, evenly in the logarithm with "log" behind it.
    # The paper's grid is "learning_rate=1e-3|1e-4, batch_size=64|128|256, temperature=0.2|0.3|0.4, beta=1e-5|1e-4|1e-3|
    # 5e-3"; this goes around it.
    c.tune.space = "learning_rate=1e-4..3e-3 log, batch_size=64|128|256, temperature=0.1..0.6, beta=1e-5..1e-1 log"
    c.tune.trials = 30  # how many runs
    c.tune.sampler = "tpe"  # tpe (learns from earlier trials) | random | grid (every pair of choices, once)
    # What is made as large as can be: validation_map (wants data.validation), or a score that needs no labels:
    # separation (the one that orders runs as MAP does) | neighbour_agreement | view_agreement | entropy | decorrelation
    # | contrast (cib_jax/retrieval/label_free.py, docs/results.md).
    c.tune.score = "validation_map"
    c.tune.images = 2000  # images of the database, at random, on which scores without labels are taken
    c.tune.workers = 0  # as compare.workers; tpe, which waits for earlier trials, takes 1
    return c
