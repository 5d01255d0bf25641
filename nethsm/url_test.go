package nethsm

import (
	"context"
	"errors"
	"net"
	"net/url"
	"slices"
	"strings"
	"testing"
)

func TestURLs(t *testing.T) {
	tests := []struct{ given, want string }{
		{"https://hsm.example", "https://hsm.example:443"},
		{"https://hsm.example/", "https://hsm.example:443"},
		{"https://HSM.example:8443/api/v1", "https://hsm.example:8443"},
		{"https://hsm.example:8443/api/v1/", "https://hsm.example:8443"},
		{"https://192.0.2.1", "https://192.0.2.1:443"},
		{"https://[2001:db8::1]:8443", "https://[2001:db8::1]:8443"},
		{"http://127.0.0.1:8080", "http://127.0.0.1:8080"},
		{"http://[::1]", "http://[::1]:80"},
		{"https://[fe80::1%25eth0]:8443", "https://[fe80::1%25eth0]:8443"},
		{"http://localhost:8080/api/v1", "http://localhost:8080"},
	}
	for _, test := range tests {
		t.Run(test.given, func(t *testing.T) {
			client := reach(t, Options{}, test.given)
			if got := client.URLs(); !slices.Equal(got, []string{test.want}) {
				t.Errorf("URLs = %v, want %s", got, test.want)
			}
			at, err := client.At(test.given)
			if err != nil || !slices.Equal(at.URLs(), []string{test.want}) {
				t.Errorf("At = %v, %v", at, err)
			}
			if _, err := client.At("https://other.example"); !errors.Is(err, ErrConfig) {
				t.Errorf("At a node that is none: %v, want ErrConfig", err)
			}
		})
	}
}

func TestOptionsThatCannotWork(t *testing.T) {
	many := make([]string, maxNodes+1)
	for i := range many {
		many[i] = "https://hsm" + strings.Repeat("x", i) + ".example"
	}
	tests := []struct {
		name    string
		options Options
		says    string
	}{
		{"no URL", Options{}, "no URL"},
		{"plain http to another machine", Options{URLs: []string{"http://192.0.2.1"}}, "in the clear"},
		{"plain http to a name", Options{URLs: []string{"http://hsm.example"}}, "in the clear"},
		{"a name that only looks local", Options{URLs: []string{"http://localhost.example"}}, "in the clear"},
		{"another scheme", Options{URLs: []string{"ftp://hsm.example"}}, "https://"},
		{"no scheme", Options{URLs: []string{"hsm.example:8443"}}, "https://"},
		{"no host", Options{URLs: []string{"https:///api/v1"}}, "no host"},
		{"another path", Options{URLs: []string{"https://hsm.example/api/v2"}}, "end after the port"},
		{"a query", Options{URLs: []string{"https://hsm.example/?a=b"}}, "end after the port"},
		{"a password in the URL", Options{URLs: []string{"https://admin:sesame@hsm.example"}}, "hsm.example holds a user"},
		{"a password in a URL that cannot be read", Options{URLs: []string{"https://admin:sesame@hsm.example:port"}}, "cannot be read"},
		{"a password and no scheme", Options{URLs: []string{"admin:sesame@hsm.example"}}, "https://"},
		{"a password and no slashes", Options{URLs: []string{"https:admin:sesame@hsm.example"}}, "no host"},
		{"a password as a scheme", Options{URLs: []string{"sesame:8443"}}, "https://"},
		{"a password in a path", Options{URLs: []string{"https://hsm.example/sesame"}}, "end after the port"},
		{"a password in a query", Options{URLs: []string{"https://hsm.example/?password=sesame"}}, "end after the port"},
		{"a password in a fragment", Options{URLs: []string{"http://192.0.2.1/#sesame"}}, "end after the port"},
		{"a port that is none", Options{URLs: []string{"https://hsm.example:65536"}}, "port"},
		{"port 0", Options{URLs: []string{"https://hsm.example:0"}}, "port"},
		{"a user agent with a line of its own", Options{URLs: []string{"https://hsm.example"}, UserAgent: "a\r\nX: y"}, "user agent"},
		{"twice the same", Options{URLs: []string{"https://hsm.example", "https://HSM.example:443/api/v1"}}, "twice"},
		{"too many", Options{URLs: many}, "64 at most"},
		{"a negative time-out", Options{URLs: []string{"https://hsm.example"}, Timeout: -1}, "negative"},
		{"a negative number of connections", Options{URLs: []string{"https://hsm.example"}, Connections: -1}, "negative"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			client, err := New(test.options)
			if client != nil || !errors.Is(err, ErrConfig) || !strings.Contains(err.Error(), test.says) {
				t.Errorf("New = %v, %v; want ErrConfig that says %q", client, err, test.says)
			}
			if err != nil && strings.Contains(err.Error(), "sesame") {
				t.Errorf("the error tells the password: %v", err)
			}
		})
	}
}

// Whatever is given, a URL that is taken is https, or http to this machine, and is taken as it is the second time.
func FuzzURL(f *testing.F) {
	for _, seed := range []string{"https://hsm.example:8443/api/v1", "http://[::1]", "http://127.0.0.1.example", "https://a:b@c", "https://%41/"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		base, err := parseURL(text)
		if err != nil {
			if !errors.Is(err, ErrConfig) {
				t.Errorf("error = %v, want ErrConfig", err)
			}
			return
		}
		again, err := parseURL(base)
		if err != nil || again != base {
			t.Errorf("%q became %q, and that %q, %v", text, base, again, err)
		}
		parsed, err := url.Parse(base)
		if err != nil || parsed.Scheme != "https" && !loopback(parsed.Hostname()) || parsed.User != nil {
			t.Errorf("%q became %q, %v", text, base, err)
		}
	})
}

// A scope of IPv6 is part of the address, and must stand the way into a request.
func TestScopeOfAnAddressIsDialled(t *testing.T) {
	var dialled string
	pool, err := newPool(Options{URLs: []string{"https://[fe80::1%25eth0]:8443"}}, func(_ context.Context, _, address string) (net.Conn, error) {
		dialled = address
		return nil, net.ErrClosed
	})
	if err != nil {
		t.Fatal(err)
	}
	client := &Client{pool: pool}
	_ = ask(t.Context(), client)
	if err := client.Close(); err != nil {
		t.Error(err)
	}
	if dialled != "[fe80::1%eth0]:8443" {
		t.Errorf("it dialled %q", dialled)
	}
}
