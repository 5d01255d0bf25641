package kmsplugin

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"slices"

	"vault-plugin-secrets-nitrokey/internal/kmsplugin/pb"
)

// SetConfig makes a wrapper from the settings of a stanza. No HSM is asked: it may be away.
func (s *Server) SetConfig(ctx context.Context, request *pb.SetConfigRequest) (*pb.SetConfigResponse, error) {
	options := request.GetOptions()
	made, err := s.configure(ctx, options.GetConfigMap(), options.GetDisallowEnvVars())
	if err != nil {
		return nil, s.fail(ctx, "SetConfig", err)
	}
	id := rand.Text()
	left, kept := s.keep(id, made)
	if !kept {
		return nil, s.fail(ctx, "SetConfig", errors.Join(errFinalized, made.close()))
	}
	if left != nil {
		s.options.Logger.Warn("a wrapper that OpenBao seems to have forgotten is ended", "key_id", left.keyID, "error", left.close())
	}
	return &pb.SetConfigResponse{WrapperId: id, WrapperConfig: &pb.WrapperConfig{Metadata: made.metadata}}, nil
}

// keep takes a wrapper in and begins it, unless the process ends. Where there are too many, it takes out the one that was not
// used for the longest time, for the caller to close.
func (s *Server) keep(id string, made *seal) (left *seal, kept bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, false
	}
	if len(s.seals) >= maxSeals {
		oldest := slices.MinFunc(slices.Collect(maps.Keys(s.seals)), func(a, b string) int {
			return cmp.Compare(s.seals[a].used, s.seals[b].used)
		})
		left = s.seals[oldest]
		delete(s.seals, oldest)
	}
	s.calls++
	made.used = s.calls
	s.seals[id] = made
	made.begin()
	return left, true
}

// configure makes a wrapper from settings.
func (s *Server) configure(ctx context.Context, settings map[string]string, noEnvironment bool) (*seal, error) {
	wanted, err := parseStanza(settings)
	if err != nil {
		return nil, err
	}
	return newSeal(ctx, s.options, wanted, noEnvironment)
}

// Type names the kind of seal.
func (s *Server) Type(ctx context.Context, request *pb.TypeRequest) (*pb.TypeResponse, error) {
	if _, err := s.find(request.GetWrapperId()); err != nil {
		return nil, s.fail(ctx, "Type", err)
	}
	return &pb.TypeResponse{Type: Type}, nil
}

// KeyId names what seals, as the ciphertexts of Encrypt do.
//
//nolint:staticcheck // OpenBao's name for it
func (s *Server) KeyId(ctx context.Context, request *pb.KeyIdRequest) (*pb.KeyIdResponse, error) {
	w, err := s.find(request.GetWrapperId())
	if err != nil {
		return nil, s.fail(ctx, "KeyId", err)
	}
	return &pb.KeyIdResponse{KeyId: w.keyID}, nil
}

// Encrypt seals a value. It is software, but for the first call where the background has not opened the authentication key
// yet.
func (s *Server) Encrypt(ctx context.Context, request *pb.EncryptRequest) (*pb.EncryptResponse, error) {
	var answer *pb.EncryptResponse
	err := s.call(ctx, "Encrypt", request.GetWrapperId(), func(ctx context.Context, w *seal) error {
		sealed, id, err := w.encrypt(ctx, request.GetPlaintext(), request.GetOptions().GetAad())
		if err != nil {
			return err
		}
		answer = &pb.EncryptResponse{Ciphertext: &pb.BlobInfo{
			Ciphertext: sealed, KeyInfo: &pb.KeyInfo{KeyId: id},
		}}
		return nil
	})
	clear(request.GetPlaintext()) // gRPC made it for this call
	return answer, err
}

// Decrypt opens what Encrypt sealed, with one operation in an HSM.
func (s *Server) Decrypt(ctx context.Context, request *pb.DecryptRequest) (*pb.DecryptResponse, error) {
	var answer *pb.DecryptResponse
	err := s.call(ctx, "Decrypt", request.GetWrapperId(), func(ctx context.Context, w *seal) error {
		plaintext, err := w.decrypt(ctx, request.GetCiphertext().GetCiphertext(), request.GetOptions().GetAad())
		answer = &pb.DecryptResponse{Plaintext: plaintext} // gRPC reads it after we have returned
		return err
	})
	if err != nil {
		return nil, err
	}
	return answer, nil
}

// Init proves before a cluster is initialised that what is sealed can be opened: a cluster whose root key nobody can open
// is lost as soon as it restarts.
func (s *Server) Init(ctx context.Context, request *pb.InitRequest) (*pb.InitResponse, error) {
	err := s.call(ctx, "Init", request.GetWrapperId(), func(ctx context.Context, w *seal) error { return w.prove(ctx) })
	if err != nil {
		return nil, err
	}
	return &pb.InitResponse{}, nil
}

// Finalize ends a wrapper.
func (s *Server) Finalize(ctx context.Context, request *pb.FinalizeRequest) (*pb.FinalizeResponse, error) {
	w, err := s.find(request.GetWrapperId())
	if err != nil {
		return nil, s.fail(ctx, "Finalize", err)
	}
	s.mu.Lock()
	delete(s.seals, request.GetWrapperId())
	s.mu.Unlock()
	if err := w.close(); err != nil {
		return nil, s.fail(ctx, "Finalize", err)
	}
	return &pb.FinalizeResponse{}, nil
}

// call does something with a wrapper, within the time that a call may take and the life of the wrapper.
func (s *Server) call(ctx context.Context, name, id string, do func(context.Context, *seal) error) error {
	w, err := s.find(id)
	if err != nil {
		return s.fail(ctx, name, err)
	}
	within, done, err := w.enter(ctx)
	if err != nil {
		return s.fail(ctx, name, err)
	}
	defer done()
	if err := do(within, w); err != nil {
		if w.life.Err() != nil {
			err = fmt.Errorf("%w: %w", errFinalized, err)
		}
		return s.fail(ctx, name, err)
	}
	s.recovered(name)
	return nil
}

// find returns the wrapper of that name.
func (s *Server) find(id string) (*seal, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	w, known := s.seals[id]
	if !known {
		return nil, errNoWrapper
	}
	s.calls++
	w.used = s.calls
	return w, nil
}
