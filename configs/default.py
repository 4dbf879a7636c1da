"""Every field of an experiment, once, with its unit and meaning. An experiment's file lists only what differs."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    c = ml_collections.ConfigDict()

    c.seed = 0  # of initial weights, order, views and bits: every random number but those of data.seed
    c.bits = 32  # length of a code, a multiple of 8
    c.k = 1000  # how many ranked images MAP@k looks at

    # Network.
    c.backbone = "efficientnet_lite0"  # vgg16 | efficientnet_lite0 | convnet
    c.backbone_weights = ""  # a weight file (.safetensors, .pth); "" = the published ones of the backbone
    c.backbone_dtype = "float32"  # float32 | bfloat16: in what the backbone computes; the head is always float32
    c.frozen = True  # True: only the hash head learns; False: the backbone learns too
    c.image_size = 0  # side of the network's square input in pixels; 0 = the backbone's usual one
    c.hidden = 1024  # width of the hash head's hidden layer

    # Method (CIBHash, https://arxiv.org/abs/2105.06138).
    c.objective = "cibhash"  # naive_cl | cl_hash | cibhash
    c.binary = "stochastic"  # stochastic: bits are drawn (the paper) | deterministic: thresholded (the published code)
    c.temperature = 0.3  # τ of the contrast
    c.beta = 0.001  # β, weight of the bottleneck term in nats
    c.augment = "photo"  # family of views: photo (the paper's) | digits

    # Optimisation: Adam with a constant learning rate.
    c.batch_size = 64  # images per step; two views each
    c.epochs = 60  # passes over the training images; the paper takes 80 for 16 bits
    c.learning_rate = 1e-3

    c.data = ml_collections.ConfigDict()
    c.data.seed = 0  # of the splits, and of the views in a bank, which runs with other seeds can so share
    c.data.name = "cifar10"  # digits | a TFDS name whose images have one label each, such as cifar10
    c.data.dir = ""  # where TFDS keeps its data sets; "" = its usual place (~/tensorflow_datasets)
    c.data.train_per_class = 500  # training images drawn per class from the database; 0 = the whole database
    c.data.queries = 0  # queries drawn from a set that comes in one piece; 0 = the set's own test split
    c.data.validation = "none"  # none | query_half (the published code: half the queries) | database (see below)
    c.data.validation_queries = 1000  # with "database": images drawn from it, outside training, as validation queries
    c.data.stored_size = 0  # side in pixels to which images are resized on the host; 0 = as stored, all of one size
    c.data.resident_mb = 2048  # training images up to this many MiB live on the device; more are streamed

    c.train = ml_collections.ConfigDict()
    c.train.views = 0  # features of this many views per image are computed once; 0 = fresh views at every step
    c.train.bank_mb = 8192  # a bank that would take more MiB than this is refused
    c.train.validate_every = 20  # epochs between validations, where data.validation is not "none"
    c.train.patience = 6  # validations without a better MAP before training stops
    c.train.checkpoint_every = 1  # epochs between checkpoints

    c.encode_batch = 100  # images per batch where nothing is learnt: the view bank, the evaluation

    c.cache = ml_collections.ConfigDict()
    # Where a frozen backbone's features are kept for later runs: "" = ~/.cache/cib_jax/features, "none" = nowhere.
    c.cache.dir = ""
    c.cache.mb = 20480  # features that were not used for longest are deleted when all take more MiB than this
    return c
