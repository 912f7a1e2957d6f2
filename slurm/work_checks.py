"""What can be found wrong with an export or a conversion before it is queued.

What the programs themselves would refuse, and room for what they write.

Source: none.
"""

from slurm.disk import free_bytes, size_of
from unimo3.errors import CheckpointError, ConfigError

Found = tuple[list[str], list[str]]


def check_export(arguments: list[str], is_later: bool) -> Found:
    """Errors, for which nothing is submitted, and notices; one line each.

    Args:
        arguments: of pretrain.export.
        is_later: whether the job waits for another, which may bring the checkpoint.
    """
    from pretrain import export
    from unimo3.checkpoint.stored import close_files
    from unimo3.checkpoint.zero import ZeroCheckpoint

    try:
        args = export.parse_arguments(arguments)
    except ConfigError as error:
        return error.errors, []
    errors: list[str] = []
    try:
        export.check(args)
    except ConfigError as error:
        errors = error.errors
    try:
        source = ZeroCheckpoint(export.choose_checkpoint(args.run, args.tag, verify=False).checkpoint)
    except CheckpointError as error:
        if is_later:
            return errors, [f"nothing to export yet: {error}"]
        return [*errors, str(error)], []
    finally:
        close_files()
    item_bytes = export.DTYPES[args.dtype].itemsize
    needed, free = 0, free_bytes(args.out)
    for name in source.names():
        dtype = source.dtype(name)
        needed += source.shape(name).numel() * (item_bytes if dtype.is_floating_point else dtype.itemsize)
    if needed > free:
        errors.append(
            f"--out {args.out}: the weights need {needed / 1e9:.3f} GB, {free / 1e9:.3f} GB are free; make room or "
            "choose another folder"
        )
    return errors, []


def check_shards(arguments: list[str]) -> Found:
    """As `check_export`, of pretrain.prepare_shards."""
    from pretrain import prepare_shards

    try:
        args = prepare_shards.parse_arguments(arguments)
        prepare_shards.check(args)
    except ConfigError as error:
        return error.errors, []
    if args.verify or args.format == "index":
        return [], []
    # Shards hold the images as they are, and little else.
    sources = {args.src.resolve(), (args.images or args.src).resolve()}
    size = sum(size_of(folder) for folder in sources if not sources & set(folder.parents))
    free = free_bytes(args.out) + size_of(args.out.with_name(args.out.name + ".partial"))
    room = f"the source holds {size / 1e9:.3f} GB, {free / 1e9:.3f} GB are free"
    if size > free and not args.max_side:
        return [f"--out {args.out}: {room}; make room, choose another folder, or give --max-side to store less"], []
    return [], [f"--out {args.out}: {room}"]
