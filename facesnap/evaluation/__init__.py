"""How good is it? `python -m facesnap.evaluation --help`; facesnap.metrics has the measures, protocol.py what is
drawn."""
