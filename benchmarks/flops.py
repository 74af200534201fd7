"""How many floating-point operations a step must cost: what is left when nothing is computed and thrown away.

A multiplication and an addition count as two. Embedding look-ups, norms, softmaxes and sums count as nothing.
"""


def block(queries, keys, dim):
    """One transformer block: 12 d² weights for each query, and two products with the keys and values it sees."""
    return 24 * queries * dim**2 + 4 * queries * keys * dim


def prefix(config, rows):
    """The condition, once a prompt: P tokens through all spatial blocks."""
    dim, length = config.num_attention_heads * config.attention_head_dim, prefix_length(config)
    return rows * config.num_spatial_layers * block(length, length, dim)


def prefix_length(config):
    if config.text_vocab_size is not None:
        return config.max_text_length
    return 0 if config.num_classes is None else 1


def spatial(config, batch_size, rows):
    """All N positions through the spatial blocks, `rows` of them (twice the batch with guidance)."""
    dim, positions = config.num_attention_heads * config.attention_head_dim, config.height * config.width
    embed = 2 * (batch_size * positions + 1) * config.codebook_dim * dim  # known positions, and one mask embedding
    return embed + rows * config.num_spatial_layers * block(positions, positions + prefix_length(config), dim)


def sampling_step(config, batch_size, block_size, guided=False):
    """One step: a spatial pass, then D cached depth steps and the head for the stacks of the block alone."""
    dim = config.num_attention_heads * config.attention_head_dim
    rows = batch_size * (2 if guided else 1)
    stacks = rows * block_size
    depth = sum(
        config.num_depth_layers * block(stacks, seen, dim) + 2 * stacks * dim * config.codebook_size
        for seen in range(1, config.code_depth + 1)
    )
    project = 2 * batch_size * block_size * (config.code_depth - 1) * config.codebook_dim * dim
    return spatial(config, batch_size, rows) + depth + project


def teacher_forcing(config, batch_size, num_masked, trained=False):
    """Forward pass of training on `num_masked` stacks in all; with `trained` the backward pass, twice as much, too."""
    dim, code_depth = config.num_attention_heads * config.attention_head_dim, config.code_depth
    # attention as computed: whole squares, also where the causal half would do
    depth = num_masked * config.num_depth_layers * block(code_depth, code_depth, dim)
    head = 2 * num_masked * code_depth * dim * config.codebook_size
    # the codebook needs no gradient: its projections have one product in the backward pass, not two
    project = 2 * num_masked * (code_depth - 1) * config.codebook_dim * dim
    embed = 2 * (batch_size * config.height * config.width + 1) * config.codebook_dim * dim
    text = 0
    if config.text_vocab_size is not None:
        text = 2 * batch_size * (config.max_text_length - 1) * dim * config.text_vocab_size
    rest = prefix(config, batch_size) + spatial(config, batch_size, batch_size) - embed + depth + head + text
    return rest * (3 if trained else 1) + (embed + project) * (2 if trained else 1)


def vgg16(resolution):
    """Forward pass of one image through VGG16's 13 convolutions, which LPIPS compares images by."""
    # input channels, output channels, how often the resolution has been halved
    convolutions = [(3, 64, 0), (64, 64, 0), (64, 128, 1), (128, 128, 1), (128, 256, 2), (256, 256, 2), (256, 256, 2)]
    convolutions += [(256, 512, 3), (512, 512, 3), (512, 512, 3), (512, 512, 4), (512, 512, 4), (512, 512, 4)]
    return sum(2 * 9 * ins * outs * (resolution >> halvings) ** 2 for ins, outs, halvings in convolutions)
