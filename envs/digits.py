"""``dsa/DigitsResNet-v0``: real digits, simulated users, a small ResNet with inline adapters."""

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
    * ``cost_weight`` (0.1): lambda; ``rounds`` (1); ``render_mode``: ``"ansi"`` or ``"rgb_array"``;
    * ``seed`` (0): of images, users, backbone and meta-initialisation;
    * ``train_users`` (600), ``val_users`` (120), ``test_users`` (240);
    * ``shifts``: names from the registry :mod:`users.shifts`;
    * ``placement`` (``"inline"``), ``rank`` (16); ``pretrain_epochs`` (60);
    * ``algorithm`` (``"fomaml"``), ``meta_steps`` (2000), ``meta_users`` (16), ``inner_steps`` (3);
    * everything else that :class:`envs.modelled.PersonalEnv`, :func:`users.digits.digits_population` and
      :func:`meta.images.pretrained_resnet` take.

    What the first ``make`` builds (a few minutes: backbone, meta-initialisation) is kept in ``$DSA_CACHE`` or
    ``~/.cache/dynamic-sparse-adapters``.

    ``info`` holds ``user`` and ``shifts``, and after a step ``accuracy``, ``loss``, ``cost``, ``active_fraction``,
    ``mask``, ``reward_accuracy``, ``reward_cost``.

    ## Versions

    * v0: first version.
    """
