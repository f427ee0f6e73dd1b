"""What may go wrong by the user's doing."""


class UserError(Exception):
    """What the user did can't work: one line naming the file or flag, its value and the remedy."""
