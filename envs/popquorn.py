"""``dsa/PopquornBert-v0`` and its form with early exits: real annotators of offensiveness, MiniLM with pathways beside it."""

from envs.single import PathwaySelectionEnv


class PopquornBertEnv(PathwaySelectionEnv):
    """Personalise a text model for what each annotator finds offensive.

    ## Description

    People disagree about which comments are offensive. A classifier on MiniLM's sentence embedding knows what they agree
    on; every annotator gives 20 judgements as support and 10 as validation. In the protocol
    ``new_annotators_and_comments`` (default) the test annotators are asked about comments on which no judgement was used
    anywhere, in ``new_annotators`` about comments that others have judged. Content warning: real comments.


    ## Observation space

    A ``Dict``, all float32 within +-10, all from the support set alone: ``user`` ``[32]`` (see
    :class:`users.embedding.UserEmbedder`) and ``pathways`` ``[13, 8]`` (see :data:`envs.statistics.NAMES`).

    ## Action space

    ``MultiBinary(13)``: attention and feed-forward of MiniLM's six layers in order of depth, then the head. All zero is
    `all_off`, the model as it was.

    ## Rewards

    ``accuracy on the validation judgements - cost_weight * cost``, where ``cost`` is the share of the personal parameters
    that are switched on.

    ## Starting state

    The next user of a random order of the split.

    ## Episode end

    ``terminated`` after ``rounds`` decisions (default 1), never ``truncated``; see :class:`envs.digits.DigitsResNetEnv`.

    ## Arguments

    * ``data_root``: folder with ``popquorn_offensiveness/`` (or ``$DSA_DATA_ROOT``);
    * ``protocol``, ``fold`` (0): see :func:`users.popquorn.popquorn`;
    * ``split`` (``"train"``), ``cost_weight`` (0.1), ``rounds`` (1), ``layerwise`` (False), ``render_mode``: see
      :class:`envs.single.PathwaySelectionEnv`, also for what a range of cost weights and ``layerwise`` add to observations;
    * ``max_length`` (128): tokens per comment;
    * everything that :class:`envs.modelled.PersonalEnv` takes, with other defaults: ``algorithm`` (``"maml"``), ``meta_steps``
      (200), ``inner_steps`` (5), ``rate_of_rates`` (0.001).

    ``info`` holds ``user``, and after a step ``accuracy``, ``loss``, ``cost``, ``active_fraction``, ``mask``,
    ``reward_accuracy``, ``reward_cost``.

    ## Versions

    * v0: first version.
    """


class PopquornBertExitEnv(PathwaySelectionEnv):
    """``dsa/PopquornBert-v0`` where a mask decides how much of MiniLM is run.

    ## Description

    The users and the encoder of :class:`PopquornBertEnv`, but the model's own readout is one more pathway. Where it is off, the
    logits are the sum of what the user's active pathways say, and inference stops after the deepest sub-layer that one of them
    reads: a mask then makes inference faster than the bare model. Content warning: real comments.

    ## Observation space

    A ``Dict``, all float32 within +-10, all from the support set alone: ``user`` ``[32]`` (see
    :class:`users.embedding.UserEmbedder`) and ``pathways`` ``[14, 8]`` (see :data:`envs.statistics.NAMES`).

    ## Action space

    ``MultiBinary(14)``: attention and feed-forward of MiniLM's six layers in order of depth, the model's own readout, then the
    user's head. A mask with nothing on is executed as `all_off`, the whole bare model with its readout on; ``info["mask"]`` is
    what was executed.

    ## Rewards

    ``accuracy on the validation judgements - cost_weight * cost``, where ``cost`` is the share of the operations of everything
    that runs for a text of 32 tokens, encoder included, in those of the mask with everything on (``cost="flops"``).

    ## Starting state

    The next user of a random order of the split.

    ## Episode end

    ``terminated`` after ``rounds`` decisions (default 1), never ``truncated``; see :class:`envs.digits.DigitsResNetEnv`.

    ## Arguments

    Those of :class:`envs.popquorn.PopquornBertEnv` and of :class:`envs.modelled.PersonalEnv`, with other defaults: ``gates``
    (``"exit"``), ``cost`` (``"flops"``; or ``"latency"``, ``"parameters"``), ``shrink`` (False),
    ``algorithm`` (``"fomaml"``), ``meta_steps`` (400), ``inner_steps`` (5), ``inner_rate`` (0.05), ``outer_rate`` (0.003),
    ``rate_of_rates`` (0.01). ``render()`` shows in a shade of its own what a mask leaves unrun.

    ``info`` holds ``user``, and after a step ``accuracy``, ``loss``, ``cost``, ``active_fraction``, ``mask``,
    ``reward_accuracy``, ``reward_cost``.

    ## Versions

    * v0: first version.
    """
