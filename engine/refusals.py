"""What to do where the operating system refuses a file: a hint that fits the cause."""

import errno

_HINTS = {
    (errno.EACCES, errno.EPERM): "you may not read it: change its permissions, or copy it",
    (errno.ENOENT, errno.ENOTDIR): "check the path, or download what is missing",
    (errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL): "give another path to it",
    (
        errno.EIO,
        errno.ESTALE,
        errno.ETIMEDOUT,
    ): "its disk or network drive fails: copy it first",
    (
        errno.EMFILE,
        errno.ENFILE,
    ): "too many files are open: close some",
}


def hint_for(error: OSError) -> str:
    """One line that fits the refusal; "" for one that speaks for itself.

    >>> hint_for(PermissionError(13, "Permission denied"))
    'you may not read it: change its permissions, or copy it'
    """
    return next((hint for codes, hint in _HINTS.items() if error.errno in codes), "")
