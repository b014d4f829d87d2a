"""Adapters to evaluation harnesses, each of which needs the package that it adapts to."""
