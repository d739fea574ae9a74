"""Where weights come from: reading.py opens files, contents.py finds weights in them, facts.py what they say of
themselves. `fastmbconv.checkpoints` maps their names; nothing here knows a model."""
