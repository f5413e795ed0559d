"""The processes of a run: devices, agreement between processes, signals, running out of memory."""
