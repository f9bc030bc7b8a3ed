"""Attention modules, one file each; chosen by the config group `attention`."""
