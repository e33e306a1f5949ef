"""What plugin authors test with: conformance suites, simulators, a pytest plugin. Nothing in noid imports this."""
