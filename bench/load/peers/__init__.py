"""Other loaders, a module each: ``load(paths) -> tensors``, and ``convert(files, out)`` where it has a format of its own.

They import nothing of this project: they run in an environment that holds the peers alone. A module's docstring says which
settings were chosen and why.
"""
