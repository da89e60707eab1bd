"""A kit for tests, public: every port in memory, faults by name, conformance checks for adapters."""
