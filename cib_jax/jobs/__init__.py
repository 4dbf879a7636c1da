"""One file per job. A job is a function of (config, workdir, …) and the only place where the parts meet."""
