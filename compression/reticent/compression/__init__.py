"""Small students, small updates and the deployable artifact."""
