"""``dsa/JesterBert-v0``: real readers of jokes, MiniLM with pathways beside it."""

from envs.single import PathwaySelectionEnv


class JesterBertEnv(PathwaySelectionEnv):
    """Personalise a text model for which of a hundred jokes a reader likes.

    ## Description

    Readers hardly agree about jokes. A classifier on MiniLM's sentence embedding knows how much each of the 100 jokes is
    liked; every reader gives 20 ratings as support, the rest is halved into validation and query.


    ## Observation space

    A ``Dict``, all float32 within +-10, all from the support set alone: ``user`` ``[32]`` (see
    :class:`users.embedding.UserEmbedder`) and ``pathways`` ``[13, 8]`` (see :data:`envs.statistics.NAMES`).

    ## Action space

    ``MultiBinary(13)``: attention and feed-forward of MiniLM's six layers in order of depth, then the head. All zero is
    `all_off`, the model as it was.

    ## Rewards

    ``accuracy on the validation ratings - cost_weight * cost``, where ``cost`` is the share of the personal parameters
    that are switched on.

    ## Starting state

    The next user of a random order of the split.

    ## Episode end

    ``terminated`` after ``rounds`` decisions (default 1), never ``truncated``; see :class:`envs.digits.DigitsResNetEnv`.

    ## Arguments

    * ``data_root``: folder with ``jester5k/`` (or ``$DSA_DATA_ROOT``);
    * ``support`` (20): ratings known of a reader; ``max_users``: readers per split, for quick tries;
    * ``split`` (``"train"``), ``cost_weight`` (0.1), ``rounds`` (1), ``layerwise`` (False), ``render_mode``: see
      :class:`envs.single.PathwaySelectionEnv`, also for what a range of cost weights and ``layerwise`` add to observations;
    * ``fit_share`` (0.2): share of the train readers for the classifier; ``max_length`` (128): tokens per joke;
    * everything that :class:`envs.modelled.PersonalEnv` takes, with other defaults: ``algorithm`` (``"maml"``), ``meta_steps``
      (500), ``meta_users`` (64), ``inner_steps`` (5), ``rate_of_rates`` (0.001), ``all_on`` (0.5).

    ``info`` holds ``user``, and after a step ``accuracy``, ``loss``, ``cost``, ``active_fraction``, ``mask``,
    ``reward_accuracy``, ``reward_cost``.

    ## Versions

    * v0: first version.
    """
