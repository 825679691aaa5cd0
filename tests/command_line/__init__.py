"""What the role asks of vLLM, put to the argument parser of the very version that it is meant for."""
