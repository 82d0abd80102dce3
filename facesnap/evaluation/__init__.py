"""How good is it? `python -m facesnap.evaluation --help`; metrics.py has the measures, protocol.py what is
drawn."""
