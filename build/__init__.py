"""Checkpoints in, a Triton model repository out: teacher for vLLM, students for TensorRT or OpenVINO."""
