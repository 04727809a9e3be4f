"""dtr-deploy: distil linear-attention twins of a model's attention layers, replace what pays, and serve the result.

Importing this package imports nothing heavy; `dtr_deploy.pipeline.build` is the way in from Python, `dtr-deploy` from a
shell. `import dtr_deploy.hybrid.model` teaches transformers to load hybrid checkpoints.
"""

__version__ = "0.1.0"
