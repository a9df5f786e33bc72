"""What a list of CLIPs tells of each, and can be sorted by: fields of ``anomalib_aprilgan.clip.catalogue.Backbone``.

A module of its own, since open_clip takes seconds to load.
"""

COLUMNS = ("name", "tower", "text", "image_size", "patch", "stages", "embed_dim", "parameters", "gflops")
