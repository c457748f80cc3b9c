"""Evaluation: functions from a model and its data to metrics, and the figures that go with them."""
