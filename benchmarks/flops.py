"""How many floating-point operations a step must cost: what is left when nothing is computed and thrown away.

A multiplication and an addition count as two. Embedding look-ups, norms, softmaxes and sums count as nothing.
"""


def _dim(config):
    return config.num_attention_heads * config.attention_head_dim


def block(queries, keys, dim):
    """One transformer block: 12 d² weights for each query, and two products with the keys and values it sees."""
    return 24 * queries * dim**2 + 4 * queries * keys * dim


def prefix(config, rows):
    """The condition, once a prompt: P tokens through all spatial blocks."""
    dim, length = _dim(config), prefix_length(config)
    return rows * config.num_spatial_layers * block(length, length, dim)


def prefix_length(config):
    if config.text_vocab_size is not None:
        return config.max_text_length
    return 0 if config.num_classes is None else 1


def spatial(config, batch_size, rows):
    """All N positions through the spatial blocks, `rows` of them (twice the batch with guidance)."""
    dim, positions = _dim(config), config.height * config.width
    embed = 2 * (batch_size * positions + 1) * config.codebook_dim * dim  # known positions, and one mask embedding
    return embed + rows * config.num_spatial_layers * block(positions, positions + prefix_length(config), dim)


def depth_step(config, stacks, depth, guided=False):
    """One code of each of some stacks, the `depth`-th from 1: cached depth blocks and head, twice with guidance."""
    dim, rows = _dim(config), stacks * (2 if guided else 1)
    project = 2 * stacks * config.codebook_dim * dim if depth > 1 else 0
    return project + config.num_depth_layers * block(rows, depth, dim) + 2 * rows * dim * config.codebook_size


def sampling_step(config, batch_size, block_size, guided=False):
    """One step: a spatial pass, then D cached depth steps and the head for the stacks of the block alone."""
    depths = range(1, config.code_depth + 1)
    depth = sum(depth_step(config, batch_size * block_size, depth, guided) for depth in depths)
    return spatial(config, batch_size, batch_size * (2 if guided else 1)) + depth


def autoregressive_prefix_length(config):
    """The autoregressive baseline has a start token where it has no condition."""
    return 1 if config.text_vocab_size is None else config.max_text_length


def autoregressive_prefix(config, rows):
    """The condition but its last token, which the first step reads, through all spatial blocks of the baseline."""
    dim, length = _dim(config), autoregressive_prefix_length(config) - 1
    return rows * config.num_spatial_layers * block(length, length, dim)


def autoregressive_spatial(config, batch_size, rows, position):
    """One token of each row through the spatial blocks of the baseline; it sees itself and the tokens before it.

    Computed is a little more: the cache has one size in all steps, and the slots that are still empty are masked.
    """
    dim = _dim(config)
    embed = 0 if config.learned_code_embedding else 2 * batch_size * config.codebook_dim * dim
    seen = autoregressive_prefix_length(config) + position
    return embed + rows * config.num_spatial_layers * block(1, seen, dim)


def autoregressive_step(config, batch_size, position, guided=False):
    """Sampling of the stack at one position by the baseline."""
    depth = sum(depth_step(config, batch_size, depth, guided) for depth in range(1, config.code_depth + 1))
    return autoregressive_spatial(config, batch_size, batch_size * (2 if guided else 1), position) + depth


def teacher_forcing(config, batch_size, num_masked, trained=False):
    """Forward pass of training on `num_masked` stacks in all; with `trained` the backward pass, twice as much, too."""
    embed = 2 * (batch_size * config.height * config.width + 1) * config.codebook_dim * _dim(config)
    blocks = prefix(config, batch_size) + spatial(config, batch_size, batch_size) - embed
    return _taught(config, batch_size, num_masked, blocks, embed, trained)


def autoregressive_teacher_forcing(config, batch_size, trained=False):
    """The same for the baseline: it learns all stacks, and reads all but the last."""
    positions = config.height * config.width
    length = autoregressive_prefix_length(config) + positions - 1
    blocks = batch_size * config.num_spatial_layers * block(length, length, _dim(config))
    embed = (
        0 if config.learned_code_embedding else 2 * batch_size * (positions - 1) * config.codebook_dim * _dim(config)
    )
    return _taught(config, batch_size, batch_size * positions, blocks, embed, trained)


def _taught(config, batch_size, stacks, blocks, embed, trained):
    """What both transformers have beside the spatial blocks, and the backward pass."""
    dim, code_depth = _dim(config), config.code_depth
    # attention as computed: whole squares, also where the causal half would do
    depth = stacks * config.num_depth_layers * block(code_depth, code_depth, dim)
    head = 2 * stacks * code_depth * dim * config.codebook_size
    # the codebook needs no gradient: its projections have one product in the backward pass, not two
    project = 2 * stacks * (code_depth - 1) * config.codebook_dim * dim
    text = 0
    if config.text_vocab_size is not None:
        text = 2 * batch_size * (config.max_text_length - 1) * dim * config.text_vocab_size
    return (blocks + depth + head + text) * (3 if trained else 1) + (embed + project) * (2 if trained else 1)


def vgg16(resolution):
    """Forward pass of one image through VGG16's 13 convolutions, which LPIPS compares images by."""
    # input channels, output channels, how often the resolution has been halved
    convolutions = [(3, 64, 0), (64, 64, 0), (64, 128, 1), (128, 128, 1), (128, 256, 2), (256, 256, 2), (256, 256, 2)]
    convolutions += [(256, 512, 3), (512, 512, 3), (512, 512, 3), (512, 512, 4), (512, 512, 4), (512, 512, 4)]
    return sum(2 * 9 * ins * outs * (resolution >> halvings) ** 2 for ins, outs, halvings in convolutions)
