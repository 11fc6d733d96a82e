"""Functions on tensors, ignorant of models. Each op is a folder: contract, backends, cases."""
