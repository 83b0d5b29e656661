"""Write trained encoders as folders that other libraries load, and compare each with the training model."""
