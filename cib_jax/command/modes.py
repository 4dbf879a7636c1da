"""Each mode's job with what the flags say of it."""

import pathlib

from absl import flags
from ml_collections import config_flags

from cib_jax import program
from cib_jax.command import flags as given
from cib_jax.program import refuse


def join(mode: str) -> None:
    """Has this process work together with others where the flags or the environment tell of some."""
    import jax

    from cib_jax.config.field_values import WHERE
    from cib_jax.config.flat import flatten
    from cib_jax.devices import available, processes, rendezvous
    from cib_jax.jobs import endings

    def tell(words: str) -> None:
        program.tell(program.says(words))

    rendezvous.join(
        given.COORDINATOR.value, given.PROCESS.value, given.PROCESSES.value, detect=given.DISTRIBUTED.value, tell=tell
    )
    available.set_up(tell)
    if processes.several():
        if not processes.first():
            tell(f"process {jax.process_index()} of {jax.process_count()} has joined; the first one reports")
        if not given.WORKDIR.value:
            raise processes.ProcessesError("--workdir: several processes need one folder; give it to all of them")
        if processes.first():
            endings.forget(given.WORKDIR.value)
        fields = {f"--config.{name}": value for name, value in flatten(given.CONFIG.value).items() if name not in WHERE}
        processes.check_alike({"--mode": mode, "--workdir": given.WORKDIR.value} | fields)
        endings.watch(given.WORKDIR.value)


def use(mode: str, workdir: pathlib.Path, *, config_named: bool) -> None:
    """Starts a job on a trained run, whose config is its own."""
    from cib_jax.config.flat import flatten
    from cib_jax.devices import rendezvous
    from cib_jax.jobs.encode import encode
    from cib_jax.jobs.evaluate import evaluate

    overrides = config_flags.get_override_values(flags.FLAGS["config"])
    if config_named:  # of an experiment named beside the run, what says which run this is must agree
        overrides = {name: flatten(given.CONFIG.value)[name] for name in ("data.name", "backbone")} | overrides
    if mode == "evaluate":
        evaluate(workdir, overrides=overrides)
        return
    if not given.CODES.value:
        refuse("--codes: --mode=encode wants a folder for the codes; give --codes=DIR")
    place = rendezvous.place(given.PROCESS.value, given.PROCESSES.value)
    encode(workdir, given.IMAGES.value, given.CODES.value, part=given.PART.value, place=place, overrides=overrides)


def check_index(mode: str, workdir: pathlib.Path | None, *, config_named: bool) -> None:
    """Refuses a job on an index whose flags cannot work."""
    if not given.INDEX.value:
        refuse(f"--index: --mode={mode} wants the index; give its folder, --index=DIR")
    if mode != "index" and (config_named or config_flags.get_override_values(flags.FLAGS["config"])):
        refuse(f"--config: an index has its own encoder; leave --config and its fields out of --mode={mode}")
    if workdir and config_named:
        refuse(f"--config: the encoder in {workdir} is trained already; leave --config or --workdir out")
    if mode == "search" and not given.QUERY.value:
        refuse("--query: --mode=search wants a photo or a folder of photos; give --query=FILE")


def look_up(mode: str, workdir: pathlib.Path | None, *, config_named: bool) -> None:
    """Starts a job on an index."""
    place, query = given.INDEX.value or "", given.QUERY.value or ""  # refused by `check_index` where they are wanted
    if mode == "index":
        from cib_jax.config.flat import flatten
        from cib_jax.jobs.index import index

        overrides = config_flags.get_override_values(flags.FLAGS["config"])
        if config_named:  # all of it was asked for
            overrides = flatten(given.CONFIG.value)
        index(place, given.IMAGES.value, workdir=workdir, config=given.CONFIG.value, overrides=overrides)
    elif mode == "duplicates":
        from cib_jax.jobs.duplicates import duplicates

        duplicates(
            place,
            radius=given.RADIUS.value,
            confirm=given.CONFIRM.value,
            form=given.FORMAT.value,
            show=given.SHOW.value,
        )
    elif mode == "serve":
        from cib_jax.jobs.serve import serve

        serve(
            place,
            host=given.HOST.value,
            port=given.PORT.value,
            below=given.BELOW.value,
            hosts=tuple(given.NAMES.value),
            proxies=tuple(given.PROXIES.value),
            frames=tuple(given.FRAMES.value),
            searches=given.SEARCHES.value,
            photo_mb=given.PHOTO_MB.value,
            megapixels=given.MEGAPIXELS.value,
        )
    elif mode == "search":
        from cib_jax.jobs.search import search
        from cib_jax.retrieval.index import kind_of

        kind, settings = kind_of(given.KIND.value)
        search(
            place,
            query,
            k=given.K.value,
            radius=given.RADIUS.value,
            kind=kind,
            settings=settings,
            rerank=given.RERANK.value,
            form=given.FORMAT.value,
            show=given.SHOW.value,
        )
