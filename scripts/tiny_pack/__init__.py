"""How the embedded tiny pack is made: procedural objects, their renders and captions, and one trainer a model."""
