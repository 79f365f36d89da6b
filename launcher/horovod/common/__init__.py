"""What does not depend on a framework, under the names that scripts import it by."""
