"""What a build leaves for others to run: the Hugging Face folder, and ONNX folders (`dtr_deploy.export.onnx`)."""
