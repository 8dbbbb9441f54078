def test_x(digits_world, side_world, text_world):
    for w in (digits_world, side_world, text_world):
        g = w.group("val", "support"); print(w.env, len(g), g.counts, g.inputs(0).shape, g.offset(0) is None, w.pathways.num_pathways)
