"""The names under which bounds and thresholds are read and set, in a model and in what is exported of it."""

# By name, the post-processor's buffer of each. Thresholds are raw: scores and maps above them are anomalous.
BUFFERS = {
    "image_min": "image_min",
    "image_threshold": "_image_threshold",
    "image_max": "image_max",
    "pixel_min": "pixel_min",
    "pixel_threshold": "_pixel_threshold",
    "pixel_max": "pixel_max",
    "map_maximum_min": "fusion.low",
    "map_maximum_max": "fusion.high",
}
# Columns of the table of a graph, a row for each class: these, and where the scales of scores and maps are cut.
COLUMNS = (*BUFFERS, "image_cut", "pixel_cut")
# How the constant with this table is called, at the end of its name.
TABLE = "post_processor.table"
