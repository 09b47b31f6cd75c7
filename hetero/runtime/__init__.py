"""Devices, lanes, weights and the executor: how a StepGraph runs."""
