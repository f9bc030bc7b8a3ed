"""Attention operators: functions of tensors and integers. Imports nothing of this project."""
