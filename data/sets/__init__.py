"""From samples to batches: selection, building, caching, packing, streaming, collating."""
