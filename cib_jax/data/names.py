"""Names of files as text: they are bytes, which need not be valid Unicode."""


def printable(name: str) -> str:
    """Returns a name, or words with one, as valid Unicode: a byte that is none of it is written as `\\udcff`."""
    return name.encode("utf-8", "backslashreplace").decode()
