"""Where rows come from: local files, hub datasets, the embedded documentation."""
