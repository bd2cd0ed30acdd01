"""Settings of all tests: properties are tried on a fixed number of cases, without a clock (the machine may be busy)."""

from hypothesis import settings

settings.register_profile("lavit_dist", deadline=None, max_examples=30)
settings.load_profile("lavit_dist")
