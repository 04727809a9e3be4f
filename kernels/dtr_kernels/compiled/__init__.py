"""The operator and the window branch for CPUs, in C: serving and training at the speed of the vector units.

The C sources in source/ are compiled once on the machine they run on (a few seconds) and loaded with ctypes. Without
a compiler everything falls back to the torch formulations, which compute the same and are several times slower.
`python -m dtr_kernels.compiled` builds ahead of time and says what was built.

build.py compiles and imports no torch, library.py loads and calls. linear.py, window.py, rows.py and step.py are what
the rest of the package uses, layer.py what a decoder layer has around its mixer.
"""
