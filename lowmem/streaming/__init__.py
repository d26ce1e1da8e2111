"""A model one decoder layer at a time, for the converter and the benchmarks."""
