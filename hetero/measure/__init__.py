"""Probes that turn this machine into a HardwareProfile."""
