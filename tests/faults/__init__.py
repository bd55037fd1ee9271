"""Faults on purpose: kills, signals, hangs and full disks under the commands of the chain."""
