"""``dsa/UnipenResNet-v0``: real writers, 62 characters, a small ResNet with pathways beside it."""

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
    * everything that :class:`envs.modelled.PersonalEnv` and :func:`meta.images.pretrained_resnet` take.

    ``info`` holds ``user``, ``collection`` (the donating site) and ``classes`` (how many the writer wrote), and after a
    step ``accuracy``, ``loss``, ``cost``, ``active_fraction``, ``mask``, ``reward_accuracy``, ``reward_cost``.

    ## Versions

    * v0: first version.
    """
