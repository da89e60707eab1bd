"""Commands that measure; each prints its ratios and writes JSON and plots into docs/benchmarks."""
