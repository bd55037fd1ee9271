"""Measuring a checkpoint: samples -> answers -> verdicts -> rates, each rate with n, an interval and a paired test."""
