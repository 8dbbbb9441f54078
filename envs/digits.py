"""``dsa/DigitsResNet-v0`` and its layerwise form: real digits, simulated users, a small ResNet with inline adapters."""

from envs.single import PathwaySelectionEnv


class DigitsResNetEnv(PathwaySelectionEnv):
    """Personalise a small ResNet for users who see handwritten digits through a shift of their own.

    ## Description

    A ResNet of six residual blocks was pre-trained on clean digits. Each user sees digits inverted, rotated, noisy,
    faint, moved and blurred, with swapped labels, or as they are; a third of the users have two shifts at once. Every
    block has an adapter behind it and every user a head of their own: seven pathways, which start from a meta-learned
    initialisation. The agent sees what 20 support images tell about a user and decides which pathways are on; these
    are then adapted on the support images by three gradient steps.

    ## Observation space

    A ``Dict``, all float32 within +-10, all from the support set alone:

    * ``user`` ``[32]``: principal components of features, labels and predictions of the population model, then its
      loss, accuracy, confidence and entropy;
    * ``pathways`` ``[7, 8]``: per pathway gradient norm, its share, signal-to-noise ratio, activation shift, relative
      change, depth, cost and present gate (see :data:`envs.statistics.NAMES`).

    ## Action space

    ``MultiBinary(7)``: six adapters in order of depth, then the head. All zero is `all_off`, the model as it was.

    ## Rewards

    ``accuracy on 40 validation images - cost_weight * cost``, where ``cost`` is the share of the personal parameters
    that are switched on.

    ## Starting state

    The next user of a random order of the split.

    ## Episode end

    ``terminated`` after ``rounds`` decisions (default 1), never ``truncated``. With several rounds adaptation goes on
    under each new mask, statistics are taken at the current weights and mask, and the reward of a round is the gain
    over the round before, so that the return is the value of the last.

    ## Arguments

    * ``split`` (``"train"``): ``"train"``, ``"val"`` or ``"test"``;
    * ``cost_weight`` (0.1): lambda, or ``"uniform:LOW:HIGH"``, drawn for every episode and then observed as ``cost_weight``
      ``[1]``; ``rounds`` (1); ``render_mode``: ``"ansi"`` or ``"rgb_array"``;
    * ``layerwise`` (False): decide one pathway per step, as in :class:`envs.digits.DigitsResNetLayerwiseEnv`;
    * ``seed`` (0): of images, users, backbone and meta-initialisation;
    * ``train_users`` (600), ``val_users`` (120), ``test_users`` (240);
    * ``shifts``: names from the registry :mod:`users.shifts`;
    * ``placement`` (``"inline"``), ``rank`` (16); ``pretrain_epochs`` (60);
    * ``algorithm`` (``"fomaml"``), ``meta_steps`` (2000), ``meta_users`` (16), ``inner_steps`` (3),
      ``outer_rate`` (0.01), ``keep`` (``"last"``), ``resample`` (False), ``shrink`` (False);
    * everything else that :class:`envs.modelled.PersonalEnv`, :func:`users.digits.digits_population` and
      :func:`meta.images.pretrained_resnet` take.

    What the first ``make`` builds (a few minutes: backbone, meta-initialisation) is kept in ``$DSA_CACHE`` or
    ``~/.cache/dynamic-sparse-adapters``.

    ``info`` holds ``user`` and ``shifts``, and after a step ``accuracy``, ``loss``, ``cost``, ``active_fraction``,
    ``mask``, ``reward_accuracy``, ``reward_cost``.

    ## Versions

    * v0: first version.
    """


class DigitsResNetLayerwiseEnv(PathwaySelectionEnv):
    """``dsa/DigitsResNet-v0`` with one pathway decided per step, from the first block to the head.

    ## Description

    The same users, model and initialisation as :class:`DigitsResNetEnv`. The agent walks along the network and decides at
    every block whether its adapter is on, knowing what it decided before, in the manner of AMC (He et al. 2018, "AMC: AutoML
    for Model Compression and Acceleration on Mobile Devices"). The model is adapted once, when the mask is whole.

    ## Observation space

    A ``Dict``, all float32 within +-10: ``user`` ``[32]`` and ``pathways`` ``[7, 8]`` as in :class:`DigitsResNetEnv`, but for
    the statistic ``gate``, which is 1 for pathways decided to be on and 0 for those decided to be off or not yet decided; and
    ``turn`` ``[7]``, 1 for the pathway to decide now.

    ## Action space

    ``MultiBinary(1)``: the gate of the pathway whose turn it is.

    ## Rewards

    0 until the last pathway is decided, then ``accuracy on 40 validation images - cost_weight * cost`` of the whole mask.

    ## Starting state

    The next user of a random order of the split, nothing decided.

    ## Episode end

    ``terminated`` after 7 steps (``rounds`` times 7), never ``truncated``.

    ## Arguments

    Those of :class:`envs.digits.DigitsResNetEnv`, with ``layerwise`` (True).

    ``info`` holds ``user``, ``shifts``, ``active_fraction`` and ``mask`` (so far) after every step, and
    ``accuracy``, ``loss``, ``cost``, ``reward_accuracy``, ``reward_cost`` when a mask is whole.

    ## Versions

    * v0: first version.
    """
