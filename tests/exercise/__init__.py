"""Random workloads with a model beside them; each module is a library for the tests and a command (`python -m`)."""
