"""``dsa/UnipenResNet-v0`` and its form with early exits: real writers, 62 characters, pathways beside a small ResNet."""

from envs.single import PathwaySelectionEnv


class UnipenResNetEnv(PathwaySelectionEnv):
    """Personalise a character recogniser for people by three examples of each character in their own hand.

    ## Description

    A small ResNet was pre-trained on the characters of some of the train writers, and on Omniglot along with them. Absolute
    size and position are lost, so that c and C, o, O and 0, or l, I and 1 can be told apart only by knowing the writer's
    hand. Every writer shows up to three images of each character they wrote; the rest of their images are halved into
    validation and query. What to predict is always one of all 62 characters.


    ## Observation space

    A ``Dict``, all float32 within +-10, all from the support set alone: ``user`` ``[32]`` (see
    :class:`users.embedding.UserEmbedder`) and ``pathways`` ``[7, 8]`` (see :data:`envs.statistics.NAMES`).

    ## Action space

    ``MultiBinary(7)``: six residual blocks in order of depth, then the head. All zero is `all_off`, the model as it was.

    ## Rewards

    ``accuracy on the validation images - cost_weight * cost``, where ``cost`` is the share of the personal parameters that are
    switched on.

    ## Starting state

    The next user of a random order of the split.

    ## Episode end

    ``terminated`` after ``rounds`` decisions (default 1), never ``truncated``; see :class:`envs.digits.DigitsResNetEnv`.

    ## Arguments

    * ``data_root``: folder with ``unipen_chars/`` and ``omniglot28/`` (or ``$DSA_DATA_ROOT``);
    * ``shots`` (3): support images per character; ``fit_share`` (0.7): share of the train writers for the backbone;
    * ``split`` (``"train"``), ``cost_weight`` (0.1), ``rounds`` (1), ``layerwise`` (False), ``render_mode``: see
      :class:`envs.single.PathwaySelectionEnv`, also for what a range of cost weights and ``layerwise`` add to observations;
    * everything that :class:`envs.modelled.PersonalEnv` and :func:`meta.images.pretrained_resnet` take, with other defaults:
      ``widths`` (``[32, 64, 128]``), ``stride`` (2), ``pretrain_epochs`` (40), ``pretrain_seed`` (0), ``augment``
      (``"handwriting"``), ``auxiliary`` (``"omniglot"``); ``meta_steps`` (150), ``inner_steps`` (12), ``inner_rate`` (2.0),
      ``head_rate`` (38.0), ``outer_rate`` (0.003), ``rate_of_rates`` (0.03), ``neutral`` (True).

    ``info`` holds ``user``, ``collection`` (the donating site) and ``classes`` (how many the writer wrote), and after a
    step ``accuracy``, ``loss``, ``cost``, ``active_fraction``, ``mask``, ``reward_accuracy``, ``reward_cost``.

    ## Versions

    * v0: first version.
    """


class UnipenResNetExitEnv(PathwaySelectionEnv):
    """``dsa/UnipenResNet-v0`` where a mask decides how much of the network is run.

    ## Description

    The users and the backbone of :class:`UnipenResNetEnv`, but the model's own readout is one more pathway. Where it is off,
    the logits are the sum of what the user's active pathways say, and inference stops after the deepest block that one of them
    reads: a mask then makes inference faster than the bare model. Pathways read the means of the four quarters of a feature
    map; they are fitted to the examples that the classifier was fitted on, to warped copies of these and to what the
    classifier says of them, and meta-learned from there under masks of all depths.

    ## Observation space

    A ``Dict``, all float32 within +-10, all from the support set alone: ``user`` ``[32]`` (see
    :class:`users.embedding.UserEmbedder`) and ``pathways`` ``[8, 8]`` (see :data:`envs.statistics.NAMES`).

    ## Action space

    ``MultiBinary(8)``: six residual blocks in order of depth, the model's own readout, then the user's head. A mask with
    nothing on is executed as `all_off`, the whole bare model with its readout on; ``info["mask"]`` is what was executed.

    ## Rewards

    ``accuracy on the validation images - cost_weight * cost``, where ``cost`` is the share of the operations of everything that
    runs, backbone included, in those of the mask with everything on (``cost="flops"``).

    ## Starting state

    The next user of a random order of the split.

    ## Episode end

    ``terminated`` after ``rounds`` decisions (default 1), never ``truncated``; see :class:`envs.digits.DigitsResNetEnv`.

    ## Arguments

    Those of :class:`envs.unipen.UnipenResNetEnv`, and of :class:`envs.modelled.PersonalEnv` and
    :func:`meta.images.pretrained_resnet`, with other defaults: ``gates`` (``"exit"``), ``cost`` (``"flops"``; or
    ``"latency"``, ``"parameters"``), ``rank`` (64), ``start_steps`` (4000), ``start_copies`` (4), ``start_augment``
    (``"handwriting"``), ``shrink`` (False), ``meta_steps`` (200), ``inner_rate`` (0.5), ``neutral`` (False). ``render()`` shows
    in a shade of its own what a mask leaves unrun.

    ``info`` holds ``user``, ``collection`` (the donating site) and ``classes`` (how many the writer wrote), and after a
    step ``accuracy``, ``loss``, ``cost``, ``active_fraction``, ``mask``, ``reward_accuracy``, ``reward_cost``.

    ## Versions

    * v0: first version.
    """
