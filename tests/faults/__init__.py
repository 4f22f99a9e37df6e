"""Faults that the suite must see: a catalogue, and the command that plants each (`make faults`)."""
